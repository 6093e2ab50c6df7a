"""Pure functions of streams: how far the tokens are apart."""
