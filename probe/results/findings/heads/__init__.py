"""What tables of attention heads say."""
