"""What tasks of one process share."""

from tasks.store.store import Store


def test_an_opened_store_is_shared(context_of):
    assert isinstance(context_of().store(), Store)
    assert context_of().store() is context_of().store()
