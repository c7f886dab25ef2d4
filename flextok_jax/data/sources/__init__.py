"""Image sources, random-access sequences of records (base.Source); registry.make_source opens them by name."""
