//! Products of groups of rows and the weighted sum of experts: against single rows, f64 and shares of ranks.

mod common;

use common::*;
use forge_kernels::tree::share;
use forge_kernels::{Backend, CpuBackend, CpuPath, DType, ExpertChoices, ExpertEntry, GroupProduct, KernelError, RowGroup, Segments};

/// Where the groups' rows begin: of different sizes, one empty, with a row between that belongs to none.
const GROUPS: [std::ops::Range<usize>; 5] = [0..1, 1..6, 6..6, 7..8, 8..29];

#[test]
fn a_row_of_a_group_is_the_row_alone() {
    let mut random = Random(41);
    let (inner, columns) = (40, 512);
    let x = random.normals(29 * columns);
    let bias = random.normals(inner);
    for dtype in DType::ALL {
        let sources: Vec<_> = GROUPS.iter().map(|_| random_matrix(&mut random, dtype, inner, columns)).collect();
        for backend in backends() {
            let weights: Vec<_> = sources
                .iter()
                .map(|bytes| {
                    let segments = Segments::from_bounds(vec![0, 256, columns]).unwrap();
                    backend.weight(source(bytes.clone(), dtype, inner, columns, segments)).unwrap()
                })
                .collect();
            let vector = backend.vector(&bias).unwrap();
            let mut outs = [backend.buffer(29, inner).unwrap(), backend.buffer(29, inner).unwrap()];
            let untouched = vec![7.0; inner];
            backend.write_rows(&mut outs[0], 6..7, &untouched).unwrap();
            // The second product has the same matrices in another order, and no bias.
            let groups = |reversed: bool| -> Vec<RowGroup<'_, CpuBackend>> {
                let weight = |index: usize| if reversed { &weights[4 - index] } else { &weights[index] };
                let group = |(index, rows): (usize, &std::ops::Range<usize>)| RowGroup {
                    rows: rows.clone(),
                    weight: weight(index),
                    bias: (!reversed).then_some(&vector),
                };
                GROUPS.iter().enumerate().map(group).collect()
            };
            let [first, second] = &mut outs;
            let mut products = [GroupProduct { groups: groups(false), out: first }, GroupProduct { groups: groups(true), out: second }];
            backend.linear_groups(&buffer(&backend, &x, columns), &mut products).unwrap();
            for (index, rows) in GROUPS.iter().enumerate() {
                for row in rows.clone() {
                    let x = &x[row * columns..(row + 1) * columns];
                    for (out, weight, bias) in [(&outs[0], index, Some(&*bias)), (&outs[1], 4 - index, None)] {
                        let alone = product(&backend, &weights[weight], x, 1, inner, bias);
                        let together = &read(&backend, out, 29)[row * inner..(row + 1) * inner];
                        assert!(bits(together) == bits(&alone), "{dtype}, {} path, row {row}", backend.path());
                    }
                }
            }
            assert_eq!(read(&backend, &outs[0], 7)[6 * inner..], untouched, "a row of no group");
        }
    }
}

/// Tokens with random experts out of `leaves`.
struct Choices {
    leaves: usize,
    starts: Vec<u32>,
    entries: Vec<ExpertEntry>,
    shared_weights: Vec<f32>,
}

impl Choices {
    fn random(random: &mut Random, tokens: usize, leaves: usize, rows: usize) -> Self {
        let mut choices = Choices { leaves, starts: vec![0], entries: Vec::new(), shared_weights: random.normals(tokens) };
        for token in 0..tokens {
            // The first token has all experts, the second none.
            let share = [leaves, 0, leaves.min(4), 1][token.min(2 + token % 2)];
            for expert in 0..leaves {
                if share == leaves || random.below(leaves) < share {
                    let entry = ExpertEntry { expert: expert as u32, row: random.below(rows) as u32, weight: random.normal() };
                    choices.entries.push(entry);
                }
            }
            choices.starts.push(choices.entries.len() as u32);
        }
        choices
    }

    /// The part with the experts of a range, counted from its start: what a rank that holds them has.
    fn of_experts(&self, experts: std::ops::Range<usize>) -> Self {
        let mut part = Choices { leaves: experts.len(), starts: vec![0], entries: Vec::new(), shared_weights: Vec::new() };
        for token in self.starts.windows(2) {
            for entry in &self.entries[token[0] as usize..token[1] as usize] {
                if experts.contains(&(entry.expert as usize)) {
                    part.entries.push(ExpertEntry { expert: entry.expert - experts.start as u32, ..*entry });
                }
            }
            part.starts.push(part.entries.len() as u32);
        }
        part
    }

    fn view(&self, shared: bool) -> ExpertChoices<'_> {
        let shared_weights = shared.then_some(&*self.shared_weights);
        ExpertChoices { leaves: self.leaves, starts: &self.starts, entries: &self.entries, shared_weights }
    }
}

#[test]
fn combined_experts_agree_with_f64_on_every_path() {
    let mut random = Random(42);
    let (tokens, rows) = (40, 60);
    for (leaves, width) in [(1, 7), (5, 16), (8, 70), (60, 33), (300, 16)] {
        let choices = Choices::random(&mut random, tokens, leaves, rows);
        let (y, shared) = (random.normals(rows * width), random.normals(tokens * width));
        for with_shared in [false, true] {
            let mut expected = Vec::new();
            for token in 0..tokens {
                for column in 0..width {
                    let entries = &choices.entries[choices.starts[token] as usize..choices.starts[token + 1] as usize];
                    let part = |entry: &ExpertEntry| f64::from(entry.weight) * f64::from(y[entry.row as usize * width + column]);
                    let own = f64::from(choices.shared_weights[token]) * f64::from(shared[token * width + column]);
                    expected.push(entries.iter().map(part).sum::<f64>() + if with_shared { own } else { 0.0 });
                }
            }
            let mut first: Option<Vec<u32>> = None;
            for backend in backends() {
                let (y, shared) = (buffer(&backend, &y, width), buffer(&backend, &shared, width));
                let mut out = backend.buffer(tokens, width).unwrap();
                backend.combine_experts(&y, with_shared.then_some(&shared), choices.view(with_shared), &mut out).unwrap();
                let actual = read(&backend, &out, tokens);
                assert!(relative_error(&actual, &expected) < 1e-6, "{leaves} experts");
                assert_eq!(first.get_or_insert_with(|| bits(&actual)), &bits(&actual));
                if !with_shared {
                    let second = bits(&actual[width..2 * width]);
                    assert!(second.iter().all(|&bits| bits == (-0.0_f32).to_bits()), "the second token has no experts");
                }
            }
        }
    }
}

#[test]
fn ranks_that_hold_subtrees_of_experts_add_to_the_whole() {
    let mut random = Random(43);
    let backend = backend(CpuPath::fastest(), 1);
    let (tokens, rows, width) = (30, 50, 19);
    for leaves in [1, 3, 6, 8, 60, 64, 128] {
        let choices = Choices::random(&mut random, tokens, leaves, rows);
        let values = random.normals(rows * width);
        let y = buffer(&backend, &values, width);
        let combine = |choices: &Choices| {
            let mut out = backend.buffer(tokens, width).unwrap();
            backend.combine_experts(&y, None, choices.view(false), &mut out).unwrap();
            read(&backend, &out, tokens)
        };
        let whole = bits(&combine(&choices));
        for ranks in [2, 4, 8] {
            let mut parts: Vec<Vec<f32>> = (0..ranks).map(|rank| combine(&choices.of_experts(share(leaves, rank, ranks)))).collect();
            // Neighbours first, as collectives do.
            while parts.len() > 1 {
                parts = parts.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
            }
            assert!(bits(&parts[0]) == whole, "{leaves} experts on {ranks} ranks");
        }
    }
}

#[test]
fn choices_that_do_not_fit_are_refused() {
    let backend = backend(CpuPath::fastest(), 1);
    let y = backend.buffer(3, 8).unwrap();
    let mut out = backend.buffer(2, 8).unwrap();
    let entry = |expert, row| ExpertEntry { expert, row, weight: 1.0 };
    let mut combine = |leaves, starts: &[u32], entries: &[ExpertEntry]| {
        let choices = ExpertChoices { leaves, starts, entries, shared_weights: None };
        backend.combine_experts(&y, None, choices, &mut out).map_err(|error| error.to_string())
    };
    assert_eq!(combine(4, &[0, 2, 3], &[entry(0, 0), entry(3, 2), entry(1, 1)]), Ok(()));
    assert!(combine(4, &[], &[]).unwrap_err().contains("starts"));
    assert!(combine(4, &[0, 1], &[entry(4, 0)]).unwrap_err().contains("leaves"));
    assert!(combine(4, &[0, 1], &[entry(0, 3)]).unwrap_err().contains(": y has"));
    assert!(combine(4, &[0, 2], &[entry(1, 0), entry(1, 1)]).unwrap_err().contains("predecessor"));
    assert!(combine(4, &[0, 2], &[entry(2, 0), entry(1, 1)]).unwrap_err().contains("predecessor"));
    assert!(combine(4, &[0, 2, 1, 2], &[entry(0, 0), entry(1, 1)]).is_err());
    assert!(combine(4, &[0, 1], &[]).unwrap_err().contains("entries"));
    assert!(combine(4, &[0, 0, 0, 0], &[]).unwrap_err().contains("out"));
}

#[test]
fn groups_that_overlap_or_do_not_fit_are_refused() {
    let mut random = Random(44);
    let backend = backend(CpuPath::fastest(), 1);
    let bytes = random_matrix(&mut random, forge_kernels::DType::F32, 8, 32);
    let weight = backend.weight(source(bytes, forge_kernels::DType::F32, 8, 32, Segments::whole(32))).unwrap();
    let x = backend.buffer(4, 32).unwrap();
    let mut out = backend.buffer(4, 8).unwrap();
    let mut run = |ranges: &[std::ops::Range<usize>]| {
        let groups = ranges.iter().map(|rows| RowGroup { rows: rows.clone(), weight: &weight, bias: None }).collect();
        backend.linear_groups(&x, &mut [GroupProduct { groups, out: &mut out }])
    };
    run(&[0..2, 2..4]).unwrap();
    run(&[]).unwrap();
    for wrong in [vec![0..2, 1..3], vec![2..4, 0..2], vec![0..2, 2..5]] {
        assert!(matches!(run(&wrong), Err(KernelError::Shape { operation: "linear_groups", .. })), "{wrong:?}");
    }
}
