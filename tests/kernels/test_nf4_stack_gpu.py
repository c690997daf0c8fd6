"""Several NF4 weights in one storage, on a GPU."""

from __future__ import annotations

import pytest

from helpers.nf4_stacks import check_one_product, check_parameters_stay


@pytest.mark.parametrize("nested", [True, False])
def test_the_parameters_stay_what_they_were(nested):
    check_parameters_stay("cuda", nested)


@pytest.mark.parametrize("rows", [1, 17, 200])
def test_one_product_is_all_products(rows):
    check_one_product("cuda", rows)
