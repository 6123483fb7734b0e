"""The databases: what is kept, in which form, and every statement that a database needs in its own words."""
