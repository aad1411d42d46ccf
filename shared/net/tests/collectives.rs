//! Collectives between processes' fabrics on loopback: the same bits as within one process, for every operation and size.

mod support;

use std::sync::Arc;
use std::thread;

use forge_kernels::{Backend, CpuBackend, CpuOptions};
use forge_net::{Collective, Fabric, GroupOptions, Transport, local, row_share};
use forge_shared::ids::Epoch;
use support::{PATIENT, fabrics, spec};

type Rank = Arc<dyn Collective<CpuBackend>>;

const TRANSPORTS: [Transport; 2] = [Transport::Quic, Transport::Tcp];

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

/// Runs `body` on every rank, each in its thread, and returns what they give in rank order.
fn on_ranks<T: Send>(ranks: &[Rank], body: impl Fn(&Rank, &CpuBackend) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || body(rank, &backend()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn formed(fabrics: &[Fabric], of_rank: &[usize], epoch: u64) -> Vec<Rank> {
    thread::scope(|scope| {
        let form = |rank: usize| fabrics[of_rank[rank]].form::<CpuBackend>(spec(fabrics, of_rank, rank, epoch)).unwrap();
        let threads: Vec<_> = (0..of_rank.len()).map(|rank| scope.spawn(move || form(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn in_one_process(size: usize) -> Vec<Rank> {
    let ranks = local::group(GroupOptions { deadline: PATIENT, ..GroupOptions::new(size, Epoch(1)) }).unwrap();
    ranks.into_iter().map(|rank| Arc::new(rank) as Rank).collect()
}

/// Values whose sums depend on their order, zeros of both signs among them.
fn value(rank: usize, index: usize) -> f32 {
    match (index * 31 + rank * 17) % 11 {
        0 => -0.0,
        1 => 1e-30,
        mixed => ((rank * 7919 + index * 104_729) % 100_003) as f32 * 1.37e-3 * if mixed % 2 == 0 { 1.0 } else { -1e4 },
    }
}

/// All operations on a matrix of this shape: the bits that each leaves.
fn all_operations(rank: &Rank, backend: &CpuBackend, rows: usize, width: usize) -> Vec<u32> {
    let (own, size) = (rank.rank(), rank.size());
    let filled = |rows: usize, width: usize| {
        let mut buffer = backend.buffer(rows.max(1), width).unwrap();
        let values: Vec<f32> = (0..rows * width).map(|index| value(own, index)).collect();
        backend.write_rows(&mut buffer, 0..rows, &values).unwrap();
        buffer
    };
    let mut bits = Vec::new();
    let mut keep = |buffer: &<CpuBackend as Backend>::Buffer, rows: usize| {
        let mut values = vec![0.0; rows * backend.width(buffer)];
        backend.read_rows(buffer, 0..rows, &mut values).unwrap();
        bits.extend(values.iter().map(|value| value.to_bits()));
    };
    let part = filled(rows, width);
    if size.is_power_of_two() {
        let mut sum = filled(rows, width);
        rank.all_reduce(backend, &mut sum, rows).unwrap();
        keep(&sum, rows);
        let mut share = backend.buffer(rows.max(1), width).unwrap();
        let got = rank.reduce_scatter(backend, &part, rows, &mut share).unwrap();
        assert_eq!(got, row_share(rows, own, size));
        keep(&share, got.len());
    }
    // Rank r has r mod 3 times the width: the first none.
    let own_part = (own % 3 > 0).then(|| filled(rows, own % 3 * width));
    let total: usize = (0..size).map(|rank| rank % 3 * width).sum();
    let mut joined = backend.buffer(rows.max(1), total.max(1)).unwrap();
    if total > 0 {
        rank.all_gather(backend, own_part.as_ref(), &mut joined, rows).unwrap();
        keep(&joined, rows);
    }
    let mut spread = filled(rows, width);
    rank.broadcast(backend, &mut spread, rows, size - 1).unwrap();
    keep(&spread, rows);
    let counts: Vec<usize> = (0..size).map(|to| row_share(rows, (to + own) % size, size).len()).collect();
    let mut swapped = backend.buffer((size * rows).max(1), width).unwrap();
    let received = rank.all_to_all(backend, &part, &counts, &mut swapped).unwrap();
    keep(&swapped, received.iter().sum());
    rank.barrier().unwrap();
    // Around the ring, beside the group's operations.
    if size > 1 {
        let mut from_before = backend.buffer(rows.max(1), width).unwrap();
        rank.send(backend, &part, 0..rows, (own + 1) % size).unwrap();
        rank.recv(backend, &mut from_before, 0..rows, (own + size - 1) % size).unwrap();
        keep(&from_before, rows);
    }
    bits
}

/// The invariant: nothing tells the transports apart. From one value to 800 KB, odd sizes and full chunks among them.
#[test]
fn operations_have_the_bits_of_one_process() {
    let shapes = [(0, 3), (1, 1), (1, 2048), (3, 5461), (4, 16_384), (1, 65_536), (2, 65_536), (5, 40_001)];
    for transport in TRANSPORTS {
        let fabrics = fabrics(4, transport, PATIENT);
        for (epoch, of_rank) in [(1, vec![0, 1]), (2, vec![3, 0, 2, 1]), (3, vec![1, 0, 0, 1]), (4, vec![2, 0, 1]), (5, vec![0])] {
            let wired = formed(&fabrics, &of_rank, epoch);
            let near = in_one_process(of_rank.len());
            for (rows, width) in shapes {
                let far = on_ranks(&wired, |rank, backend| all_operations(rank, backend, rows, width));
                let near = on_ranks(&near, |rank, backend| all_operations(rank, backend, rows, width));
                assert!(far == near, "{transport:?} {of_rank:?}: {rows} × {width}");
            }
        }
    }
}

#[test]
fn sums_need_a_power_of_two_and_peers_must_be_others() {
    let fabrics = fabrics(3, Transport::Quic, PATIENT);
    let wired = formed(&fabrics, &[0, 1, 2], 1);
    on_ranks(&wired, |rank, backend| {
        let mut buffer = backend.buffer(1, 1).unwrap();
        assert!(rank.all_reduce(backend, &mut buffer, 1).unwrap_err().to_string().contains("power of two; the nearest is 2"));
        assert!(rank.send(backend, &buffer, 0..1, rank.rank()).unwrap_err().to_string().contains("name another rank"));
        assert!(rank.broadcast(backend, &mut buffer, 1, 3).unwrap_err().to_string().contains("rank 3"));
        rank.barrier().unwrap();
    });
}

#[test]
fn ranks_that_disagree_are_told_and_meet_again_at_a_later_epoch() {
    for transport in TRANSPORTS {
        let fabrics = fabrics(2, transport, PATIENT);
        let wired = formed(&fabrics, &[0, 1], 1);
        let results = on_ranks(&wired, |rank, backend| {
            let rows = 1 + rank.rank();
            let mut buffer = backend.buffer(2, 2).unwrap();
            let error = rank.all_reduce(backend, &mut buffer, rows).unwrap_err().to_string();
            let again = rank.barrier().unwrap_err().to_string();
            assert!(again.contains("the group of epoch 1 was aborted"), "{again}");
            assert!(rank.rejoin(Epoch(1)).is_err());
            let next = rank.rejoin(Epoch(2)).unwrap();
            next.all_reduce(backend, &mut buffer, 2).unwrap();
            error
        });
        assert!(results.iter().any(|error| error.contains("brought")), "{results:?}");
        // The old epoch is over for good.
        let late = fabrics[0].form::<CpuBackend>(spec(&fabrics, &[0, 1], 0, 1)).map(|_| ()).unwrap_err();
        assert!(late.to_string().contains("only a later one can be formed"), "{late}");
    }
}
