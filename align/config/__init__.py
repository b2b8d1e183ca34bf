"""From the words of a command and YAML recipes to one checked configuration."""
