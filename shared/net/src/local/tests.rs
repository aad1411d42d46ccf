use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use forge_kernels::{Backend, CpuBackend, CpuOptions, tree};
use proptest::prelude::*;

use super::*;
use crate::{Collective, row_share};

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

/// Runs `body` on every rank of a group, each in its thread, and returns what they give in rank order.
fn on_ranks<T: Send>(options: GroupOptions, body: impl Fn(&LocalRank, &CpuBackend) -> T + Sync) -> Vec<T> {
    let ranks = group(options).unwrap();
    let backend = backend();
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(|| body(rank, &backend))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn of_size(size: usize) -> GroupOptions {
    GroupOptions { deadline: Duration::from_secs(20), ..GroupOptions::new(size, Epoch(4)) }
}

/// The sum of leaves in the tree's order, as one process computes it.
fn sum_of_leaves(leaves: &[f32]) -> f32 {
    match leaves {
        [] => -0.0,
        [leaf] => *leaf,
        _ => {
            let (low, high) = leaves.split_at(leaves.len().div_ceil(2));
            sum_of_leaves(low) + sum_of_leaves(high)
        }
    }
}

fn filled(backend: &CpuBackend, rows: usize, values: &[f32]) -> <CpuBackend as Backend>::Buffer {
    let mut buffer = backend.buffer(rows, values.len() / rows).unwrap();
    backend.write_rows(&mut buffer, 0..rows, values).unwrap();
    buffer
}

fn values(backend: &CpuBackend, buffer: &<CpuBackend as Backend>::Buffer, rows: usize) -> Vec<f32> {
    let mut values = vec![0.0; rows * backend.width(buffer)];
    backend.read_rows(buffer, 0..rows, &mut values).unwrap();
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The invariant: for every number of leaves and ranks, all ranks hold the bits of one process with all leaves.
    #[test]
    fn reduced_subtrees_are_the_whole_tree(seed in proptest::collection::vec(-1e30f32..1e30, 8 * 6), signs in any::<u64>()) {
        let (rows, width) = (2, 3);
        // Zeros of both signs among the values: an empty share must not turn −0.0 into 0.0.
        let value = |index: usize| match (signs >> index) & 3 {
            0 => -0.0,
            1 => seed[index] * 1e-38,
            _ => seed[index],
        };
        for leaves in 1..=8 {
            let leaf = |index: usize| -> Vec<f32> { (0..leaves).map(|leaf| value(index * 8 + leaf)).collect() };
            let expected: Vec<f32> = (0..rows * width).map(|index| sum_of_leaves(&leaf(index))).collect();
            for size in [1, 2, 4, 8] {
                let sums = on_ranks(of_size(size), |rank, backend| {
                    let share = tree::share(leaves, Collective::<CpuBackend>::rank(rank), size);
                    let part: Vec<f32> = (0..rows * width).map(|index| sum_of_leaves(&leaf(index)[share.clone()])).collect();
                    let mut buffer = filled(backend, rows, &part);
                    rank.all_reduce(backend, &mut buffer, rows).unwrap();
                    let mut sum = vec![0.0; rows * width];
                    backend.read_rows(&buffer, 0..rows, &mut sum).unwrap();
                    sum
                });
                for sum in sums {
                    prop_assert_eq!(bits(&sum), bits(&expected), "{} leaves on {} ranks", leaves, size);
                }
            }
        }
    }
}

#[test]
fn gathers_uneven_and_absent_columns_in_rank_order() {
    let widths = [3, 0, 1, 2];
    let gathered = on_ranks(of_size(4), |rank, backend| {
        let own = rank.rank;
        let values: Vec<f32> = (0..2 * widths[own]).map(|index| (100 * own + index) as f32).collect();
        let part = (widths[own] > 0).then(|| filled(backend, 2, &values));
        let mut out = backend.buffer(2, 6).unwrap();
        rank.all_gather(backend, part.as_ref(), &mut out, 2).unwrap();
        let mut all = vec![0.0; 12];
        backend.read_rows(&out, 0..2, &mut all).unwrap();
        all
    });
    for all in gathered {
        assert_eq!(all, [0.0, 1.0, 2.0, 200.0, 300.0, 301.0, 3.0, 4.0, 5.0, 201.0, 302.0, 303.0]);
    }
}

#[test]
fn broadcasts_the_roots_rows_and_keeps_operations_apart() {
    let rounds = 200;
    let seen = on_ranks(of_size(4), |rank, backend| {
        (0..rounds)
            .map(|round| {
                let mut buffer = filled(backend, 1, &[(rank.rank * 1000 + round) as f32]);
                rank.broadcast(backend, &mut buffer, 1, round % 4).unwrap();
                Collective::<CpuBackend>::barrier(rank).unwrap();
                let mut value = [0.0];
                backend.read_rows(&buffer, 0..1, &mut value).unwrap();
                value[0]
            })
            .collect::<Vec<_>>()
    });
    let expected: Vec<f32> = (0..rounds).map(|round| (round % 4 * 1000 + round) as f32).collect();
    assert!(seen.iter().all(|values| *values == expected));
}

#[test]
fn a_missing_rank_is_noticed_in_time_and_the_group_is_over() {
    let options = GroupOptions { deadline: Duration::from_millis(50), ..of_size(2) };
    let ranks = group(options).unwrap();
    let start = Instant::now();
    let barrier = |rank: &LocalRank| Collective::<CpuBackend>::barrier(rank);
    assert!(matches!(barrier(&ranks[0]), Err(NetError::Timeout { missing: 1, size: 2, .. })));
    assert!(start.elapsed() < Duration::from_secs(10));
    // The late rank learns of it at once instead of waiting in turn.
    assert!(matches!(barrier(&ranks[1]), Err(NetError::Aborted { epoch: Epoch(4), .. })));
}

#[test]
fn an_abort_wakes_all_waiters_and_keeps_the_first_reason() {
    let ranks = group(of_size(4)).unwrap();
    let started = Barrier::new(4);
    let start = Instant::now();
    thread::scope(|scope| {
        let waiters: Vec<_> = ranks[..3]
            .iter()
            .map(|rank| {
                scope.spawn(|| {
                    started.wait();
                    Collective::<CpuBackend>::barrier(rank)
                })
            })
            .collect();
        started.wait();
        Collective::<CpuBackend>::abort(&ranks[3], "device lost");
        Collective::<CpuBackend>::abort(&ranks[3], "second reason");
        for waiter in waiters {
            match waiter.join().unwrap() {
                Err(NetError::Aborted { reason, .. }) => assert_eq!(reason, "device lost"),
                other => panic!("{other:?}"),
            }
        }
    });
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn ranks_that_disagree_are_refused() {
    let results = on_ranks(of_size(2), |rank, backend| {
        let rows = 1 + rank.rank;
        let mut buffer = backend.buffer(2, 2).unwrap();
        rank.all_reduce(backend, &mut buffer, rows)
    });
    assert!(results.iter().all(|result| matches!(result, Err(NetError::Mismatch { .. } | NetError::Aborted { .. }))), "{results:?}");
    assert!(results.iter().any(|result| matches!(result, Err(NetError::Mismatch { .. }))));

    let results = on_ranks(of_size(2), |rank, backend| {
        let mut buffer = backend.buffer(1, 1).unwrap();
        if rank.rank == 0 { rank.all_reduce(backend, &mut buffer, 1) } else { rank.broadcast(backend, &mut buffer, 1, 0) }
    });
    assert!(results.iter().all(|result| result.is_err()));
}

#[test]
fn groups_that_cannot_add_say_so_and_do_the_rest() {
    assert!(matches!(group(of_size(0)), Err(NetError::NoRanks)));
    for (size, expected) in [(3, 2), (5, 4), (6, 4), (7, 4)] {
        let done = on_ranks(of_size(size), |rank, backend| {
            let mut buffer = filled(backend, 1, &[rank.rank as f32]);
            let sum = rank.all_reduce(backend, &mut buffer, 1);
            assert!(matches!(sum, Err(NetError::GroupSize { nearest, .. }) if nearest == expected), "{sum:?}");
            rank.broadcast(backend, &mut buffer, 1, size - 1).unwrap();
            values(backend, &buffer, 1)
        });
        assert!(done.iter().all(|value| *value == [(size - 1) as f32]));
    }
}

#[test]
fn a_scattered_sum_is_the_whole_one_cut_into_shares() {
    for rows in [0, 1, 3, 4, 9] {
        let both = on_ranks(of_size(4), |rank, backend| {
            let part: Vec<f32> = (0..rows * 3).map(|index| (rank.rank + 1) as f32 * 1.1e-3 + index as f32).collect();
            let mut buffer = backend.buffer(rows.max(1), 3).unwrap();
            backend.write_rows(&mut buffer, 0..rows, &part).unwrap();
            let mut out = backend.buffer(3, 3).unwrap();
            let share = rank.reduce_scatter(backend, &buffer, rows, &mut out).unwrap();
            assert_eq!(share, row_share(rows, rank.rank, 4));
            rank.all_reduce(backend, &mut buffer, rows).unwrap();
            (bits(&values(backend, &out, share.len())), bits(&values(backend, &buffer, rows)), share)
        });
        for (scattered, whole, share) in both {
            assert_eq!(scattered, whole[share.start * 3..share.end * 3]);
        }
    }
}

#[test]
fn every_rank_gets_its_own_rows_in_the_order_of_ranks() {
    // Rank r gives rank t as many rows as (r + 2 t) mod 4: some none.
    let count = |from: usize, to: usize| (from + 2 * to) % 4;
    on_ranks(of_size(3), |rank, backend| {
        let own = rank.rank;
        let counts: Vec<usize> = (0..3).map(|to| count(own, to)).collect();
        let rows: Vec<f32> =
            (0..3).flat_map(|to| (0..count(own, to)).flat_map(move |row| [(own * 100 + to * 10 + row) as f32, 0.5])).collect();
        let mut buffer = backend.buffer(9, 2).unwrap();
        backend.write_rows(&mut buffer, 0..rows.len() / 2, &rows).unwrap();
        let mut out = backend.buffer(9, 2).unwrap();
        let received = rank.all_to_all(backend, &buffer, &counts, &mut out).unwrap();
        assert_eq!(received, (0..3).map(|from| count(from, own)).collect::<Vec<_>>());
        let expected: Vec<f32> =
            (0..3).flat_map(|from| (0..count(from, own)).flat_map(move |row| [(from * 100 + own * 10 + row) as f32, 0.5])).collect();
        assert_eq!(values(backend, &out, expected.len() / 2), expected);
    });
}

#[test]
fn rows_that_are_sent_arrive_in_order_beside_the_groups_operations() {
    on_ranks(of_size(2), |rank, backend| {
        for round in 0..100 {
            if rank.rank == 0 {
                let buffer = filled(backend, 2, &[0.0, round as f32]);
                rank.send(backend, &buffer, 1..2, 1).unwrap();
            }
        }
        Collective::<CpuBackend>::barrier(rank).unwrap();
        for round in 0..100 {
            if rank.rank == 1 {
                let mut buffer = backend.buffer(3, 1).unwrap();
                rank.recv(backend, &mut buffer, 2..3, 0).unwrap();
                assert_eq!(values(backend, &buffer, 3)[2], round as f32);
            }
        }
    });
}

#[test]
fn rows_of_another_shape_and_ranks_outside_are_refused() {
    let results = on_ranks(of_size(2), |rank, backend| {
        let mut buffer = backend.buffer(2, 2).unwrap();
        if rank.rank == 0 { rank.send(backend, &buffer, 0..2, 1) } else { rank.recv(backend, &mut buffer, 0..1, 0) }
    });
    assert!(matches!(results[1], Err(NetError::Mismatch { operation: "recv", rank: 1, .. })), "{results:?}");

    on_ranks(of_size(2), |rank, backend| {
        let mut buffer = backend.buffer(1, 1).unwrap();
        for named in [rank.rank, 2] {
            assert!(matches!(rank.send(backend, &buffer, 0..1, named), Err(NetError::NotAPeer { .. })));
            assert!(matches!(rank.recv(backend, &mut buffer, 0..1, named), Err(NetError::NotAPeer { .. })));
        }
        assert!(matches!(rank.broadcast(backend, &mut buffer, 1, 2), Err(NetError::NotAPeer { named: 2, .. })));
        // No wait was begun, so the group lives.
        Collective::<CpuBackend>::barrier(rank).unwrap();
    });
}

#[test]
fn a_letter_that_nobody_sends_is_waited_for_within_bounds() {
    let options = GroupOptions { deadline: Duration::from_millis(50), ..of_size(2) };
    let ranks = group(options).unwrap();
    let backend = backend();
    let mut buffer = backend.buffer(1, 1).unwrap();
    assert!(matches!(ranks[0].recv(&backend, &mut buffer, 0..1, 1), Err(NetError::Timeout { missing: 1, .. })));
    assert!(matches!(ranks[1].send(&backend, &buffer, 0..1, 0), Err(NetError::Aborted { .. })));
}

#[test]
fn ranks_meet_again_at_a_later_epoch() {
    on_ranks(of_size(4), |rank, backend| {
        if rank.rank == 2 {
            Collective::<CpuBackend>::abort(rank, "a test");
        }
        while Collective::<CpuBackend>::barrier(rank).is_ok() {}
        assert!(matches!(Collective::<CpuBackend>::rejoin(rank, Epoch(4)), Err(NetError::OldEpoch { .. })));
        let next: Arc<dyn Collective<CpuBackend>> = rank.rejoin(Epoch(6)).unwrap();
        assert_eq!((next.rank(), next.size(), next.epoch()), (rank.rank, 4, Epoch(6)));
        let mut buffer = filled(backend, 1, &[1.0]);
        next.all_reduce(backend, &mut buffer, 1).unwrap();
        assert_eq!(values(backend, &buffer, 1), [4.0]);
        // Whoever comes with an epoch that others have passed is told so.
        assert!(matches!(Collective::<CpuBackend>::rejoin(rank, Epoch(5)), Err(NetError::OldEpoch { current: Epoch(6), .. })));
        next.barrier().unwrap();
    });
}
