"""From records to token ids and loss masks: the only code that tokenises."""
