"""Files and folders: safe paths, copies, archives."""
