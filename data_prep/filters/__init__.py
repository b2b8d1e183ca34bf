"""Declared steps that drop or repair rows, one file each: `data.filters: {NAME: {OPTION: value}}`."""
