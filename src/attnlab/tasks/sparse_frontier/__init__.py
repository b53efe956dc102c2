"""Long-context tasks of controlled length, dispersion and number of queries, in symbols that small models learn."""
