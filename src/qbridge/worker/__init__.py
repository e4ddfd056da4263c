"""What runs inside a worker: consumer, requests, strategy, start-up."""
