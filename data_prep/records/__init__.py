"""From files to records of one kind: told formats, filters, mixtures, and a tally of what was dropped."""
