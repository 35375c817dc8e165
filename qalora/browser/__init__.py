"""A page that chats with an exported model in a browser."""

from qalora.browser.page import write_page

__all__ = ["write_page"]
