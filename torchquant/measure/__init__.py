"""How close two models are, and how long they take."""
