"""`reproduce`: the paper's claims as data, the runs that decide them, and what those say."""
