"""The scheduler: decides for each request whether, when and where it runs. Envoy moves it."""
