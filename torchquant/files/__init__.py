"""Files: written whole or not at all, sealed with digests, read without running what they say."""
