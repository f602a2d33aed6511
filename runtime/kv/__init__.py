"""Keys and values of tokens: pages on the device and below it, and how they move."""
