"""The commands: a module each, which turns a command line into settings and prints what comes of them."""
