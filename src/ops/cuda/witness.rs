//! A recording held against CUDA's own list of what is in it.

use crate::ops::launch::Node;

/// A node of a graph, as CUDA lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(in crate::ops) enum Listed {
    /// A kernel.
    Kernel {
        /// The function's name in its module.
        function: String,
        /// Blocks in each dimension.
        grid: [u32; 3],
        /// Threads of a block in each dimension.
        block: [u32; 3],
    },
    /// Anything else, as CUDA names its kind.
    Other(String),
}

/// A fault planted in a recording, to see that it is found. It counts kernels, a library's among
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The n-th one is left out.
    Drop(usize),
    /// The n-th one is there twice.
    Double(usize),
    /// The n-th one has half of its blocks, and so computes half of its rows.
    Halve(usize),
}

/// Whether the nodes of a recording are what was launched, one to one and in order. A product by a
/// library is as many nodes as it added, none of which has a name of ours.
///
/// # Errors
/// The first difference, with both sides.
pub(in crate::ops) fn witness(launched: &[Node], listed: &[Listed]) -> Result<(), String> {
    let is_ours = |name: &String| {
        launched.iter().any(|n| matches!(n, Node::Ours { function, .. } if function == name))
    };
    // A library starts kernels that are none of ours, and takes, sets and frees memory for them.
    let is_of = |launch: &Node, listed: &Listed| match (launch, listed) {
        (
            Node::Ours { function, grid, block },
            Listed::Kernel { function: f, grid: g, block: b },
        ) => (function, grid, block) == (f, g, b),
        (Node::Ours { .. }, Listed::Other(_)) => false,
        (Node::Library { .. }, Listed::Kernel { function, .. }) => !is_ours(function),
        (Node::Library { .. }, Listed::Other(kind)) => {
            ["memset", "mem_alloc", "mem_free"].contains(&kind.as_str())
        }
    };
    let mut rest = listed;
    for (i, node) in launched.iter().enumerate() {
        let nodes = match node {
            Node::Ours { .. } => 1,
            Node::Library { nodes } => *nodes,
        };
        let its = rest.get(..nodes).unwrap_or_default();
        if its.is_empty() || !its.iter().all(|listed| is_of(node, listed)) {
            let there = rest.first().map_or("nothing more".into(), shown_listed);
            let (launch, all) = (shown(node), launched.len());
            return Err(format!("launch {} of {all} is {launch}; in its place is {there}", i + 1));
        }
        rest = &rest[nodes..];
    }
    match rest.first() {
        None => Ok(()),
        Some(node) => {
            let (all, there) = (launched.len(), shown_listed(node));
            Err(format!("after all {all} launches there is also {there}"))
        }
    }
}

fn shown(node: &Node) -> String {
    match node {
        Node::Ours { function, grid, block } => shown_kernel(function, grid, block),
        Node::Library { nodes } => format!("a library's product of {nodes} nodes"),
    }
}

fn shown_listed(node: &Listed) -> String {
    match node {
        Listed::Kernel { function, grid, block } => shown_kernel(function, grid, block),
        Listed::Other(kind) => format!("a node of kind {kind}"),
    }
}

fn shown_kernel(function: &str, [x, y, z]: &[u32; 3], [a, b, c]: &[u32; 3]) -> String {
    format!("{function} on {x} x {y} x {z} blocks of {a} x {b} x {c} threads")
}

/// 0 … n − 1 in an order in which every edge leads onwards; of several the smallest comes first.
/// None where edges go round.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) fn in_order(n: usize, edges: &[(usize, usize)]) -> Option<Vec<usize>> {
    let mut waits = vec![0; n];
    edges.iter().for_each(|&(_, to)| waits[to] += 1);
    let mut ready: std::collections::BTreeSet<_> = (0..n).filter(|&i| waits[i] == 0).collect();
    let mut order = vec![];
    while let Some(i) = ready.pop_first() {
        order.push(i);
        for &(_, to) in edges.iter().filter(|(from, _)| *from == i) {
            waits[to] -= 1;
            if waits[to] == 0 {
                ready.insert(to);
            }
        }
    }
    (order.len() == n).then_some(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(function: &str) -> Node {
        Node::Ours { function: function.into(), grid: [4, 1, 1], block: [128, 1, 1] }
    }

    fn kernel(function: &str) -> Listed {
        Listed::Kernel { function: function.into(), grid: [4, 1, 1], block: [128, 1, 1] }
    }

    fn library(nodes: usize) -> Node {
        Node::Library { nodes }
    }

    fn memset() -> Listed {
        Listed::Other("memset".into())
    }

    #[test]
    fn equal_lists_match() {
        let launched = [ours("a"), library(2), library(1), ours("b"), library(2)];
        let listed = [
            kernel("a"),
            memset(),
            kernel("gemm"),
            kernel("gemm"),
            kernel("b"),
            kernel("gemm"),
            kernel("reduce"),
        ];
        assert_eq!(witness(&launched, &listed), Ok(()));
        let memory = |kind: &str| Listed::Other(kind.into());
        let listed = [memory("mem_alloc"), kernel("gemm"), kernel("reduce"), memory("mem_free")];
        assert_eq!(witness(&[library(4)], &listed), Ok(()));
        assert_eq!(witness(&[], &[]), Ok(()));
    }

    #[test]
    fn every_difference_is_told_with_both_sides() {
        let check = |launched: &[Node], listed: &[Listed], parts: &[&str]| {
            let said = witness(launched, listed).unwrap_err();
            assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        };
        let two = [ours("a"), ours("b")];
        check(&two, &[kernel("b")], &["launch 1 of 2 is a on 4 x 1 x 1", "in its place is b on"]);
        check(&two, &[kernel("a")], &["launch 2 of 2 is b", "in its place is nothing more"]);
        check(
            &two,
            &[kernel("a"), kernel("a"), kernel("b")],
            &["launch 2 of 2 is b", "place is a"],
        );
        check(&two, &[kernel("a"), kernel("b"), kernel("b")], &["after all 2 launches", "also b"]);
        check(&two, &[kernel("a"), memset(), kernel("b")], &["launch 2 of 2 is b", "kind memset"]);
        let wide = Listed::Kernel { function: "a".into(), grid: [5, 1, 1], block: [128, 1, 1] };
        check(&[ours("a")], &[wide], &["is a on 4 x 1 x 1 blocks of 128", "is a on 5 x 1 x 1"]);
        let one = [ours("a"), library(1), ours("b")];
        check(&one, &[kernel("a"), kernel("b")], &["launch 2 of 3 is a library's", "is b on"]);
        let copy = Listed::Other("memcpy".into());
        check(&one, &[kernel("a"), copy, kernel("b")], &["launch 2 of 3", "kind memcpy"]);
        // One kernel more than the product added: twice the same, or somebody else's.
        for more in ["gemm", "candle_add"] {
            let listed = [kernel("a"), kernel("gemm"), kernel(more), kernel("b")];
            check(&one, &listed, &["launch 3 of 3 is b", more]);
        }
        let libraries = [library(1), library(1), ours("b")];
        check(&libraries, &[kernel("gemm"), kernel("b")], &["launch 2 of 3 is a library's"]);
        check(&[], &[memset()], &["after all 0 launches there is also a node of kind memset"]);
    }

    #[test]
    fn edges_lead_onwards() {
        assert_eq!(in_order(3, &[(2, 0), (0, 1)]), Some(vec![2, 0, 1]));
        assert_eq!(in_order(4, &[(3, 1), (0, 1)]), Some(vec![0, 2, 3, 1]));
        assert_eq!(in_order(2, &[(0, 1), (1, 0)]), None);
        assert_eq!(in_order(0, &[]), Some(vec![]));
    }
}
