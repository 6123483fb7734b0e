"""What goes over the wire and which update wins: pure, without a database and without HTTP."""
