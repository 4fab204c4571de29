"""Does the personality show?"""
