"""The processes a session is made of, each a thin shell around one room."""
