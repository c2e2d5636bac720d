"""From a prompt's text to hidden states: tags, emphasis, tokens, the tokenizer, encoding."""
