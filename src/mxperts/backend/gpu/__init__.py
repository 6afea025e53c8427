"""placeholder: the lead writes it"""
