"""Model room: RoPE schemes, extending a Hugging Face folder to a longer window, writing one from streamed weights."""
