"""One file a target: CAPABILITIES, lower(), and what it takes to run the result."""
