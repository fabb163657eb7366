"""Images drawn by a program: five kinds of scenes in a plain look and four styles."""
