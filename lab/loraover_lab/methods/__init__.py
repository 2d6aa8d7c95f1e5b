"""Methods of other papers, each with the class of its settings; entry points of `loraover.methods` name them."""
