"""The client of servers that speak OpenAI's protocol, and of their dialects."""
