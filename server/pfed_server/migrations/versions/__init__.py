"""One change of the schema each; the file's number is the schema that it leads to."""
