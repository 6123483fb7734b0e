"""What became of the calls, for people and programs: reports, lists and files."""
