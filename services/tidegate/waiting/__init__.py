"""The waiting room: a stream that tells its reader its place in the queue until the answer comes."""
