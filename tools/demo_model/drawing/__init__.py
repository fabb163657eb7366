"""Pictures drawn by a program: five kinds of scenes, each in a plain look and four styles at any weights."""
