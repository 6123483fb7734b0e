"""What goes over the wire, and which update wins. Pure: it needs neither a database nor HTTP."""
