"""The databases: the tables, the connections, and the statements that SQLite and PostgreSQL need each in own SQL."""
