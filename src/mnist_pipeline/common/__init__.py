"""What every other folder uses: errors, files, paths, params and scores. It imports no other folder."""
