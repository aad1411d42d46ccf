//! Calls of a mixture's operations: operands checked, then handed to the kernels.

use super::{CpuBackend, CpuBuffer, expect_at_least, expect_equal};
use crate::backend::{ExpertChoices, GroupProduct};
use crate::error::Result;
use crate::experts::{CombineTask, combine_token, merges_after_present};
use crate::linear::CheckedProduct;
use crate::memory::SharedPointer;

/// [`crate::Backend::linear_groups`]: every group of every product in one parallel region.
pub(super) fn linear_groups(backend: &CpuBackend, x: &CpuBuffer, products: &mut [GroupProduct<'_, CpuBackend>]) -> Result<()> {
    const NAME: &str = "linear_groups";
    let mut checked = Vec::with_capacity(products.iter().map(|product| product.groups.len()).sum());
    let mut rows = 0;
    for product in products {
        let (out_rows, out_width) = (product.out.rows, product.out.width);
        let out = SharedPointer::new(&mut product.out.values);
        let mut next = 0;
        for group in &product.groups {
            // Ascending, so disjoint: two groups of one output never write the same row.
            expect_at_least(NAME, "first row of a group", group.rows.start, next)?;
            next = group.rows.end.max(group.rows.start);
            expect_at_least(NAME, "x", x.rows, next)?;
            expect_at_least(NAME, "out", out_rows, next)?;
            expect_equal(NAME, "x row", x.width, group.weight.columns)?;
            expect_equal(NAME, "out row", out_width, group.weight.rows)?;
            if let Some(bias) = group.bias {
                expect_equal(NAME, "bias", bias.length, group.weight.rows)?;
            }
            if group.rows.is_empty() {
                continue;
            }
            let bias = group.bias.map(|bias| &*bias.values);
            checked.push(CheckedProduct { weight: group.weight, tokens: group.rows.clone(), bias, out, out_width });
        }
        rows = rows.max(next);
    }
    if checked.is_empty() { Ok(()) } else { backend.products(x, rows, &checked) }
}

/// [`crate::Backend::combine_experts`].
pub(super) fn combine_experts(
    backend: &CpuBackend,
    y: &CpuBuffer,
    shared: Option<&CpuBuffer>,
    choices: ExpertChoices<'_>,
    out: &mut CpuBuffer,
) -> Result<()> {
    let tokens = check_choices(y, shared, choices, out)?;
    let mut merges = Vec::with_capacity(choices.entries.len());
    for token in 0..tokens {
        merges_after_present(entries_of(choices, token), choices.leaves, &mut merges);
    }
    let width = out.width;
    let target = SharedPointer::new(&mut out.values);
    backend.over_rows(tokens, width, |tokens| {
        for token in tokens {
            let weight = choices.shared_weights.map_or(1.0, |weights| weights[token]);
            let entries = choices.starts[token] as usize..choices.starts[token + 1] as usize;
            let task = CombineTask {
                y: y.values.as_ptr(),
                entries: &choices.entries[entries.clone()],
                merges: &merges[entries],
                shared: shared.map(|shared| (shared.row(token).as_ptr(), weight)),
                out: target.get().wrapping_add(token * width),
                width,
            };
            // SAFETY: `check_choices` made sure of rows, widths and the entries' order; each token has one task.
            unsafe { combine_token(backend.path, task) };
        }
    });
    Ok(())
}

/// A token's entries.
fn entries_of(choices: ExpertChoices<'_>, token: usize) -> &[crate::backend::ExpertEntry] {
    &choices.entries[choices.starts[token] as usize..choices.starts[token + 1] as usize]
}

/// Everything the kernel relies on. Returns the number of tokens.
fn check_choices(y: &CpuBuffer, shared: Option<&CpuBuffer>, choices: ExpertChoices<'_>, out: &CpuBuffer) -> Result<usize> {
    const NAME: &str = "combine_experts";
    expect_at_least(NAME, "starts", choices.starts.len(), 1)?;
    let tokens = choices.starts.len() - 1;
    expect_equal(NAME, "first start", choices.starts[0] as usize, 0)?;
    expect_equal(NAME, "entries", choices.entries.len(), choices.starts[tokens] as usize)?;
    expect_at_least(NAME, "most leaves", 1 << 31, choices.leaves)?;
    expect_at_least(NAME, "out", out.rows, tokens)?;
    expect_equal(NAME, "y row", y.width, out.width)?;
    if let Some(shared) = shared {
        expect_at_least(NAME, "shared", shared.rows, tokens)?;
        expect_equal(NAME, "shared row", shared.width, out.width)?;
    }
    if let Some(weights) = choices.shared_weights {
        expect_at_least(NAME, "shared_weights", weights.len(), tokens)?;
    }
    for pair in choices.starts.windows(2) {
        expect_at_least(NAME, "start of the next token", pair[1] as usize, pair[0] as usize)?;
    }
    for token in 0..tokens {
        let mut next_expert = 0;
        for entry in entries_of(choices, token) {
            expect_at_least(NAME, "expert after its predecessor", entry.expert as usize, next_expert)?;
            next_expert = entry.expert as usize + 1;
            expect_at_least(NAME, "leaves", choices.leaves, next_expert)?;
            expect_at_least(NAME, "y", y.rows, entry.row as usize + 1)?;
        }
    }
    Ok(tokens)
}
