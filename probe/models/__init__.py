"""From a name to a model that can be measured, with its tokenizer or processor."""
