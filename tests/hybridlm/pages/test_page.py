from hybridlm.pages.blocks import Shown, Table
from hybridlm.pages.page import html_table, markdown_table


def test_the_best_cells_are_set_off_and_numbers_are_sorted_by_their_values():
    table = Table({"a": "name", "b": "much"}, [{"a": "x", "b": Shown("1.0 k", 1000)}, {"a": "y"}], {(0, "b")})
    page = html_table(table)
    assert '<td class="text">x</td><td class="best" data-value="1000">1.0 k</td>' in page
    assert page.count("best") == 1
    assert markdown_table(table).splitlines()[2:] == ["| x | **1.0 k** |", "| y | - |"]
