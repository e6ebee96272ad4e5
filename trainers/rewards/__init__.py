"""Task prompts, rewards and metrics for language understanding, for any trainer that takes reward functions."""
