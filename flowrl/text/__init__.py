"""What language models add to the trainer: what is known of an iteration's answers, credit of tokens, factors and terms of the loss, shaping."""
