"""What every service needs: settings, errors, headers, logs, metrics, gRPC servers and clients, the arena."""
