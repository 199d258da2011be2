def page(found):
    return "# soon\n"
