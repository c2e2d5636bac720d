"""From a prompt's text to hidden states: tags, AND, editing, emphasis, tokens, the tokenizer, encoding."""
