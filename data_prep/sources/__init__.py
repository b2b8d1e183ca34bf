"""From files, archives and the hub to rows with their place, and back."""
