"""What everything else stands on: errors, options, registries, files and hashes. No torch."""
