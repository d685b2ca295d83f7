"""Programs, saved graphs and archives: written whole, sealed with digests, read without running what they say."""
