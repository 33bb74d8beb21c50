"""What `bessemer init` makes a project from: files of the user's own, and other tools' configurations."""
