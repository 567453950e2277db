"""The command line: runs the mesh on one machine, talks to it, and looks at it."""
