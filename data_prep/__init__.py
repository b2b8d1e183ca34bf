"""What is said: sources, formats, rendering to tokens. No models, no torch at import time."""
